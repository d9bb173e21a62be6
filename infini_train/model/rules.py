"""All memory rules, by the name that a configuration gives them."""

from .memory import MemoryRule, PaperDelta, PaperLinear
from .selective import SelectiveDelta

RULES: dict[str, type[MemoryRule]] = {
    "paper-linear": PaperLinear,
    "paper-delta": PaperDelta,
    "selective-delta": SelectiveDelta,
}
