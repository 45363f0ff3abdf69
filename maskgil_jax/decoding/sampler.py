"""Settings of the sampler, and what a compiled decoder is made of.

`SamplerConfig` is what people set. A decoder is compiled from its `Program`, the few settings that
shape the computation; all others become the numbers of a `Plan`, which it is given. So another
guidance scale, temperature or schedule needs no compilation.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from maskgil_jax import masking
from maskgil_jax.decoding import guidance, orders, remasking

# Logits divided by less than this could overflow float32.
MIN_TEMPERATURE = 1e-4


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplerConfig:
    """Everything that shapes a generation, besides the model, the condition and the seed.

    Attributes:
        num_steps: decoding steps T, from 1 to the number of tokens.
        schedule: curve of the masked share, one of `masking.SCHEDULES`.
        schedule_form: how the curve is used, one of `masking.FORMS`.
        rescale: whether the schedule is scaled to the tokens unknown at the start; if not, counts
            are those of a fully masked image and the last step takes what is left.
        guidance_scale: s ≥ 0; 1 means no guidance.
        guidance_schedule: one of `guidance.GUIDANCE_SCHEDULES`.
        guidance_power: exponent of `power_cosine`, more than 0.
        guidance_start: step i of T is guided only from i/T ≥ this share on.
        guidance_stop: and only while i/T < this share.
        temperature: divides the logits, at least 1e-4; or 0: take the most probable code.
        temperature_annealing: step i of T has temperature + this · (1 - (i+1)/T).
        top_k: draw among the k most likely codes; 0 for all.
        top_p: draw among the fewest codes whose probabilities sum to p, in (0, 1]; 1 for all.
        order: which tokens are revealed first, one of `orders.ORDERS`.
        gumbel_temperature: of the order `confidence`, weight of the Gumbel noise in the first step;
            it falls linearly to 0 in the last. Large values approach a random order.
        halton_roll: of the order `halton`, whether each image has its own random shift of it.
        remasking: whether decoded tokens are taken back, one of `remasking.REMASKING`.
        remasking_strength: η in [0, 1], the share that is taken back in a step.
        remasking_choice: which ones, one of `remasking.CHOICES`.
    """

    num_steps: int = 8
    schedule: str = "arccos"
    schedule_form: str = "increments"
    rescale: bool = True
    guidance_scale: float = 2.0
    guidance_schedule: str = "linear"
    guidance_power: float = 1.0
    guidance_start: float = 0.0
    guidance_stop: float = 1.0
    temperature: float = 1.0
    temperature_annealing: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    order: str = "confidence"
    gumbel_temperature: float = 4.5
    halton_roll: bool = False
    remasking: str = "none"
    remasking_strength: float = 0.05
    remasking_choice: str = "random"

    def __post_init__(self):
        for name in ("num_steps", "top_k"):
            if not isinstance(getattr(self, name), int | np.integer):
                raise ValueError(f"{name} {getattr(self, name)!r} is no whole number")
        for name in ("rescale", "halton_roll"):
            if not isinstance(getattr(self, name), bool | np.bool_):
                raise ValueError(f"{name} {getattr(self, name)!r} is neither True nor False")
        if self.num_steps < 1:
            raise ValueError(f"num_steps {self.num_steps} is out of range; allowed: 1 or more")
        masking.check_choice("schedule", self.schedule, masking.SCHEDULES)
        masking.check_choice("schedule_form", self.schedule_form, masking.FORMS)
        masking.check_choice("order", self.order, orders.ORDERS)
        masking.check_choice("remasking", self.remasking, remasking.REMASKING)
        masking.check_choice("remasking_choice", self.remasking_choice, remasking.CHOICES)
        self.guidance_scales()
        for name in ("temperature", "temperature_annealing", "gumbel_temperature"):
            if not (np.isfinite(getattr(self, name)) and getattr(self, name) >= 0):
                raise ValueError(
                    f"{name} {getattr(self, name)} is out of range; allowed: 0 or more, finite"
                )
        if self.top_k < 0:
            raise ValueError(f"top_k {self.top_k} is out of range; allowed: 0 (all codes) or more")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p {self.top_p} is out of range; allowed: more than 0, up to 1")
        if not 0 <= self.remasking_strength <= 1:
            raise ValueError(
                f"remasking_strength {self.remasking_strength} is out of range; allowed: 0 to 1"
            )
        if 0 < self.temperature < MIN_TEMPERATURE:
            raise ValueError(
                f"temperature {self.temperature} is too small to divide by; allowed: 0 (the most "
                f"probable code) or at least {MIN_TEMPERATURE}"
            )
        drawing = {"temperature_annealing": 0, "top_k": 0, "top_p": 1}
        for name, unset in drawing.items():
            if self.temperature == 0 and getattr(self, name) != unset:
                raise ValueError(
                    f"{name} {getattr(self, name)} has no meaning at temperature 0, where no code "
                    f"is drawn; leave it at {unset}"
                )

    def describe(self) -> str:
        """Return the settings that matter most, for a line of news."""
        return (
            f"{self.num_steps} steps, {self.schedule} {self.schedule_form}, "
            f"{self.guidance_schedule} guidance {self.guidance_scale:g}, "
            f"temperature {self.temperature:g}, Gumbel {self.gumbel_temperature:g}"
        )

    def guidance_scales(self) -> np.ndarray:
        """Return the guidance scale of every step, float32 [num_steps]."""
        return guidance.guidance_scales(
            self.guidance_schedule,
            self.guidance_scale,
            self.num_steps,
            self.guidance_power,
            (self.guidance_start, self.guidance_stop),
        )

    def temperatures(self) -> np.ndarray:
        """Return what divides the logits in every step, float32 [num_steps]."""
        progress = np.arange(1, self.num_steps + 1) / self.num_steps
        temperatures = self.temperature + self.temperature_annealing * (1 - progress)
        return temperatures.astype(np.float32)

    def program(self) -> "Program":
        """Return what shapes the computation."""
        return Program(
            num_steps=self.num_steps,
            guided=guidance.guided_steps(
                self.guidance_schedule,
                self.guidance_scale,
                self.num_steps,
                (self.guidance_start, self.guidance_stop),
            ),
            greedy=self.temperature == 0,
            top_k=self.top_k,
            filtered=self.top_p < 1,
            order=self.order,
            halton_roll=self.halton_roll,
            remasking=self.remasking,
            remasking_choice=self.remasking_choice,
        )

    def plan(self, unknown: Int[Array | np.ndarray, " b"], seq_len: int) -> "Plan":
        """Return the numbers of every step.

        Args:
            unknown: tokens to generate, of each image.
            seq_len: tokens of an image.

        Raises:
            ValueError: if there are more steps than tokens.
        """
        fades = np.linspace(1.0, 0.0, self.num_steps) if self.num_steps > 1 else np.zeros(1)
        return Plan(
            counts=self.reveal_counts(unknown, seq_len),
            guidance_scales=self.guidance_scales(),
            temperatures=self.temperatures(),
            noise=np.asarray(self.gumbel_temperature * fades, np.float32),
            top_p=np.float32(self.top_p),
            remasking_strength=np.float32(self.remasking_strength),
        )

    def reveal_counts(
        self, unknown: Int[Array | np.ndarray, " b"], seq_len: int
    ) -> Int[Array, "b t"]:
        """Return how many tokens each step reveals, given the numbers unknown at the start."""
        table = masking.reveal_table(self.schedule, self.num_steps, seq_len, self.schedule_form)
        if self.rescale:
            return jnp.asarray(table)[unknown]
        revealed = jnp.minimum(np.cumsum(table[seq_len])[None], unknown[:, None])
        revealed = revealed.at[:, -1].set(unknown)
        return jnp.diff(revealed, axis=1, prepend=0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
    """The settings that shape a compiled decoder.

    Attributes:
        num_steps: decoding steps T.
        guided: of every step, whether its guidance scale may be another than 1.
        greedy: whether the most probable code is taken instead of a drawn one.
        top_k: draw among the k most likely codes; 0 for all.
        filtered: whether top-p leaves out codes.
        order: which tokens are revealed first.
        halton_roll: whether each image has its own shift of the order `halton`.
        remasking: whether decoded tokens are taken back.
        remasking_choice: which ones.
    """

    num_steps: int
    guided: tuple[bool, ...]
    greedy: bool
    top_k: int
    filtered: bool
    order: str
    halton_roll: bool
    remasking: str
    remasking_choice: str


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """The numbers that a compiled decoder is given.

    Attributes:
        counts: int32 [b, t], how many tokens every step reveals.
        guidance_scales: float32 [t].
        temperatures: float32 [t], divide the logits; not read by a greedy program.
        noise: float32 [t], weight of the Gumbel noise of the order `confidence`.
        top_p: float32 [], probability that the codes to draw among sum to.
        remasking_strength: float32 [], η.
    """

    counts: Any
    guidance_scales: Any
    temperatures: Any
    noise: Any
    top_p: Any
    remasking_strength: Any
