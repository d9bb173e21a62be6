"""Prompts that ask for a number out of long text: made up from a seed, as long as a tokenizer's tokens allow."""

import random
from collections.abc import Callable

# A filler sentence is one of each, in this order: 20^5 sentences, none with a digit.
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
    return " ".join(draw.choice(words.split("|")) for words in FILLER) + "."


def name(draw: random.Random) -> str:
    """Six letters that can be spoken, such as `bavolu`."""
    return "".join(draw.choice("bdfgklmnprstvz") + draw.choice("aeiou") for _ in range(3))


def number(draw: random.Random) -> str:
    return str(draw.randrange(10_000, 100_000))


class Passkey:
    """One number in text about other things (the prompt of Mohtashami and Jaggi, arXiv 2305.16300)."""

    def __init__(self, draw: random.Random, depth: float, bos: str):
        self.draw, self.depth, self.bos, self.target = draw, depth, bos, number(draw)

    def unit(self) -> str:
        return sentence(self.draw) + " "

    def prompt(self, units: list[str]) -> str:
        at = round(self.depth * len(units))
        key = f"The pass key is {self.target}. Remember it. {self.target} is the pass key. "
        text = "".join([*units[:at], key, *units[at:]])
        return (
            f"{self.bos}There is an important info hidden inside a lot of irrelevant text. Find it and memorize it. "
            f"I will quiz you about the important information there.\n\n{text}\n\n"
            "What is the pass key? The pass key is"
        )


class KeyValue:
    """A list of names with a number each; the number of one of them is asked for."""

    def __init__(self, draw: random.Random, depth: float, bos: str):
        self.draw, self.depth, self.bos, self.target, self.key = draw, depth, bos, number(draw), name(draw)
        self.names = {self.key}

    def unit(self) -> str:
        while (new := name(self.draw)) in self.names:
            pass
        self.names.add(new)
        return f"{new}: {number(self.draw)}\n"

    def prompt(self, units: list[str]) -> str:
        at = round(self.depth * len(units))
        pairs = [*units[:at], f"{self.key}: {self.target}\n", *units[at:]]
        question = f"The number of {self.key}, from the list above:\n{self.key}:"
        return f"{self.bos}Every name has a number.\n\n{''.join(pairs)}\n{question}"


RECALL: dict[str, type[Passkey] | type[KeyValue]] = {"passkey": Passkey, "kv": KeyValue}


def fill(task: Passkey | KeyValue, count: Callable[[str], int], length: int, added: int) -> tuple[str, int]:
    """A prompt with as many units as fit into `length` tokens, `added` ones included, and its tokens.

    Raises ValueError if it is too long without any.
    """
    units: list[str] = []
    room = length - added - count(task.prompt(units))
    if room < 0:
        raise ValueError(f"lengths: found {length}, expected at least {length - room}, those of an empty prompt")
    while room > 0:
        units.append(task.unit())
        room -= count(units[-1])
    # Tokens of parts need not add up to those of the whole.
    while added + count(task.prompt(units)) <= length:
        units.append(task.unit())
    while (size := added + count(prompt := task.prompt(units))) > length:
        units.pop()
    return prompt, size
