"""Every method by name: one flat file each, explained by its difference to grpo.py."""

from __future__ import annotations

import difflib
from dataclasses import is_dataclass

from tropism.errors import ConfigError
from tropism.load import load
from tropism.methods.cispo import CISPO
from tropism.methods.constrained import Constrained
from tropism.methods.dapo import DAPO
from tropism.methods.dpo import DPO
from tropism.methods.dr_grpo import DrGRPO
from tropism.methods.follow_up import FollowUp
from tropism.methods.g_opd import GOPD
from tropism.methods.gated import Gated
from tropism.methods.gdpo import GDPO
from tropism.methods.grpo import GRPO
from tropism.methods.gspo import GSPO
from tropism.methods.kto import KTO
from tropism.methods.max_rl import MaxRL
from tropism.methods.mopd import MOPD
from tropism.methods.opd import OPD
from tropism.methods.openclaw import OpenClaw
from tropism.methods.orpo import ORPO
from tropism.methods.ppo import PPO
from tropism.methods.process_reward import ProcessReward
from tropism.methods.reinforce import REINFORCE
from tropism.methods.reinforce_pp import ReinforcePP
from tropism.methods.reopold import REOPOLD
from tropism.methods.reward_model import RewardModel
from tropism.methods.rlcsd import RLCSD
from tropism.methods.rloo import RLOO
from tropism.methods.rlsd import RLSD
from tropism.methods.sdft import SDFT
from tropism.methods.sdpg import SDPG
from tropism.methods.sdpo import SDPO
from tropism.methods.sft import SFT
from tropism.methods.simpo import SimPO
from tropism.methods.srpo import SRPO

METHODS: dict[str, type] = {
    "grpo": GRPO,
    "dr_grpo": DrGRPO,
    "gdpo": GDPO,
    "constrained": Constrained,
    "reinforce": REINFORCE,
    "rloo": RLOO,
    "dapo": DAPO,
    "gspo": GSPO,
    "cispo": CISPO,
    "max_rl": MaxRL,
    "reinforce_pp": ReinforcePP,
    "ppo": PPO,
    "sdpo": SDPO,
    "sdft": SDFT,
    "rlsd": RLSD,
    "rlcsd": RLCSD,
    "srpo": SRPO,
    "sdpg": SDPG,
    "openclaw": OpenClaw,
    "follow_up": FollowUp,
    "opd": OPD,
    "g_opd": GOPD,
    "reopold": REOPOLD,
    "mopd": MOPD,
    "gated": Gated,
    "sft": SFT,
    "dpo": DPO,
    "simpo": SimPO,
    "orpo": ORPO,
    "kto": KTO,
    "reward_model": RewardModel,
    "process_reward": ProcessReward,
}


def find(name: str) -> type:
    """The method of this name, or somebody's own as file.py:name or module:name."""
    if name in METHODS:
        return METHODS[name]
    if ":" in name:
        own: type = load(name)
        lacks = [what for what in ("needs", "credit", "weights", "loss") if not hasattr(own, what)]
        if lacks or not (isinstance(own, type) and is_dataclass(own)):
            raise ConfigError(
                f"{name} is no method{', for it lacks ' + ', '.join(lacks) if lacks else ''}. A method is a frozen "
                "dataclass with needs, credit, weights and loss."
            )
        return own
    close = difflib.get_close_matches(name.lower(), METHODS, 1) or list(METHODS)
    raise ConfigError(f"there is no method {name!r}. Did you mean {' or '.join(close)}?")
