"""All memory rules, by the name that a configuration gives them."""

from .memory_rule import MemoryRule
from .paper_rules import PaperDelta, PaperLinear
from .selective_delta import SelectiveDelta

RULES: dict[str, type[MemoryRule]] = {
    "paper-linear": PaperLinear,
    "paper-delta": PaperDelta,
    "selective-delta": SelectiveDelta,
}
