"""Generates prompts that ask for a number in a long text, from a seed and with a given number of tokens."""

import random
from collections.abc import Callable

# A filler sentence has one phrase of each line, in this order. This gives 20^5 sentences, none with a digit.
FILLER = (
    "The old gardener|A young teacher|The quiet fisherman|My neighbour|The tall baker|A tired soldier|"
    "The village doctor|A careful painter|The farmer's daughter|An honest merchant|The night watchman|"
    "A clever student|The ferry captain|His grandmother|The new postman|A famous singer|The stone mason|"
    "Her cousin|The librarian|A travelling clockmaker",
    "carried|found|sold|remembered|painted|borrowed|described|lost|repaired|bought|hid|measured|"
    "wrapped|noticed|forgot|cleaned|gathered|lifted|admired|counted",
    "a basket of apples|the broken lantern|two silver spoons|a letter from the coast|the wooden ladder|"
    "some warm bread|an empty bottle|the blue curtain|a bundle of maps|the heavy kettle|a pair of boots|"
    "the garden gate|a sack of flour|the cracked mirror|several old coins|a small violin|"
    "the fishing nets|a jar of honey|the painted chair|a woollen coat",
    "near the harbour|behind the church|at the market|under the bridge|beside the mill|"
    "in the narrow lane|on the hill|outside the inn|by the frozen lake|in the back room|along the river|"
    "at the edge of the forest|across the square|below the tower|in the orchard|next to the well|"
    "on the upper floor|at the crossroads|inside the barn|by the window",
    "before sunrise|after the storm|on a cold evening|during the long summer|while it rained|"
    "at the end of the week|when the bells rang|without a word|late in autumn|for the second time|"
    "as the guests arrived|in great haste|on the way home|just after dinner|with some reluctance|"
    "early in spring|as everyone slept|once more|to nobody's surprise|in the morning fog",
)


def sentence(draw: random.Random) -> str:
    """Draw a filler sentence."""
    return " ".join(draw.choice(words.split("|")) for words in FILLER) + "."


def name(draw: random.Random) -> str:
    """Draw a pronounceable name of six letters, such as `bavolu`."""
    return "".join(draw.choice("bdfgklmnprstvz") + draw.choice("aeiou") for _ in range(3))


def number(draw: random.Random) -> str:
    """Draw a number of five digits."""
    return str(draw.randrange(10_000, 100_000))


class PasskeyPrompt:
    """A number hidden in unrelated text (the prompt of Mohtashami and Jaggi, arXiv 2305.16300).

    Args:
        draw: random generator of the prompt.
        depth: where the number is, from 0 (the beginning of the text) to 1 (its end).
        bos: put at the start of the prompt; may be empty.
    """

    def __init__(self, draw: random.Random, depth: float, bos: str):
        self.draw, self.depth, self.bos, self.target = draw, depth, bos, number(draw)

    def unit(self) -> str:
        """Draw a sentence of filler."""
        return sentence(self.draw) + " "

    def prompt(self, units: list[str]) -> str:
        """Put the prompt together from these units and the one that holds the target."""
        at = round(self.depth * len(units))
        key = f"The pass key is {self.target}. Remember it. {self.target} is the pass key. "
        text = "".join([*units[:at], key, *units[at:]])
        return (
            f"{self.bos}There is an important info hidden inside a lot of irrelevant text. Find it and memorize it. "
            f"I will quiz you about the important information there.\n\n{text}\n\n"
            "What is the pass key? The pass key is"
        )


class KeyValuePrompt:
    """A list of names with numbers and a question for the number of one name; arguments as for PasskeyPrompt."""

    def __init__(self, draw: random.Random, depth: float, bos: str):
        self.draw, self.depth, self.bos, self.target, self.key = draw, depth, bos, number(draw), name(draw)
        self.names = {self.key}

    def unit(self) -> str:
        """Draw a line with a name that is not in the list yet, and its number."""
        while (new := name(self.draw)) in self.names:
            pass
        self.names.add(new)
        return f"{new}: {number(self.draw)}\n"

    def prompt(self, units: list[str]) -> str:
        """Put the prompt together from these units and the one that holds the target."""
        at = round(self.depth * len(units))
        pairs = [*units[:at], f"{self.key}: {self.target}\n", *units[at:]]
        question = f"The number of {self.key}, from the list above:\n{self.key}:"
        return f"{self.bos}Every name has a number.\n\n{''.join(pairs)}\n{question}"


PROMPTS: dict[str, type[PasskeyPrompt] | type[KeyValuePrompt]] = {"passkey": PasskeyPrompt, "kv": KeyValuePrompt}


def fill_prompt(
    task: PasskeyPrompt | KeyValuePrompt, count: Callable[[str], int], length: int, added: int
) -> tuple[str, int]:
    """Extend a prompt with as many units (sentences or pairs) as fit into `length` tokens.

    Args:
        task: the prompt to extend.
        count: counts the tokens of a text.
        length: maximum number of tokens.
        added: tokens that the tokenizer adds to the prompt, which are part of `length`.

    Returns:
        The prompt and its number of tokens, `added` included.

    Raises:
        ValueError: the prompt is too long without any unit.
    """
    units: list[str] = []
    room = length - added - count(task.prompt(units))
    if room < 0:
        raise ValueError(f"lengths: found {length}, expected at least {length - room}, those of an empty prompt")
    while room > 0:
        units.append(task.unit())
        room -= count(units[-1])
    # The tokens of the units are only an estimate, because tokens may cross the boundaries between units.
    while added + count(task.prompt(units)) <= length:
        units.append(task.unit())
    while (size := added + count(prompt := task.prompt(units))) > length:
        units.pop()
    return prompt, size
