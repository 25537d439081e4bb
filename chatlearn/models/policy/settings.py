"""How a policy is updated: the plain values that every trainer takes."""

from __future__ import annotations

from dataclasses import dataclass

from chatlearn.algorithm.losses import Bounds
from chatlearn.algorithm.objective import Objective
from chatlearn.errors import TrainerError
from chatlearn.models.policy.attention_kernels import ATTENTIONS
from chatlearn.models.policy.lora import Lora
from chatlearn.models.policy.optimizer import Schedule, dtype_of


@dataclass(frozen=True, slots=True)
class TrainerSettings:
    """How the policy is updated. Plain values; the configuration is read elsewhere."""

    lr: float = 1e-6
    min_lr: float = 0.0
    weight_decay: float = 0.01
    """Of matrices; norms and biases have none."""
    betas: tuple[float, float] = (0.9, 0.999)
    clip_grad: float = 1.0
    """Largest L2 norm of the gradient; 0 leaves it as it is."""
    lr_schedule: str = "constant"
    """constant, linear or cosine."""
    warmup_steps: int = 0
    total_steps: int = 0
    """Optimizer steps of the whole run; linear and cosine need it."""
    kl_coef: float = 0.0
    """Weight of KL(policy ‖ reference); 0 never runs the reference."""
    entropy_coef: float = 0.0
    """Weight of the entropy bonus; 0 does not compute it."""
    loss: str = "clip"
    """A name in ``algorithm.losses.LOSSES``."""
    pos_clip_ratio: float = 0.2
    neg_clip_ratio: float = 0.2
    dual_clip_ratio: float | None = None
    correction: str = "none"
    """A name in ``algorithm.corrections.CORRECTIONS``, or none."""
    correction_low: float | None = None
    """None = as the correction has it."""
    correction_high: float | None = None
    kl_estimator: str = "k3"
    gradient_checkpointing: bool = False
    """Keep only the layers' inputs and compute the rest again: less memory, about 1/3 slower."""
    precision: str = "fp32"
    """fp32, or bf16: parameters in bf16 with fp32 masters, gradients summed in fp32."""
    tree_packing: bool = True
    """Compute what samples begin with together once, where the model can."""
    attention: str = "auto"
    """flash, flex or sdpa; auto takes the first that the machine has, see ``find_planner``."""
    lora: Lora | None = None
    """Train only adapters beside a frozen model; None = train all parameters."""

    def __post_init__(self) -> None:
        dtype_of(self.precision)
        _ = self.objective
        if self.attention not in ATTENTIONS:
            raise TrainerError(
                f"attention is {self.attention!r}; it must be one of {list(ATTENTIONS)}. "
                "Set models.policy_trainer.attention."
            )

    @property
    def objective(self) -> Objective:
        """What an update minimises. Raises TrainerError."""
        return Objective(
            loss=self.loss,
            bounds=Bounds(self.neg_clip_ratio, self.pos_clip_ratio, self.dual_clip_ratio),
            correction=self.correction,
            correction_low=self.correction_low,
            correction_high=self.correction_high,
            kl_coef=self.kl_coef,
            kl_estimator=self.kl_estimator,
            entropy_coef=self.entropy_coef,
        )

    @property
    def schedule(self) -> Schedule:
        return Schedule(self.lr, self.min_lr, self.lr_schedule, self.warmup_steps, self.total_steps)
