"""All memory rules by name. configuration.py lists the same names as a type, for the command line."""

from .memory_rule import MemoryRule
from .paper_rules import PaperDelta, PaperLinear
from .selective_delta import SelectiveDelta

RULES: dict[str, type[MemoryRule]] = {
    "paper-linear": PaperLinear,
    "paper-delta": PaperDelta,
    "selective-delta": SelectiveDelta,
}
