"""All memory rules, by the name that a configuration gives them."""

from .memory import PaperDelta, PaperLinear
from .selective import SelectiveDelta

RULES: dict[str, type[PaperLinear] | type[SelectiveDelta]] = {
    "paper-linear": PaperLinear,
    "paper-delta": PaperDelta,
    "selective-delta": SelectiveDelta,
}
