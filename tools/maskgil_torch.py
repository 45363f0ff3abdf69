"""MaskGIL in plain PyTorch: load an exported checkpoint, compute logits, generate tokens.

    python tools/convert_checkpoint.py export --src DIR --dst maskgil.safetensors
    python tools/maskgil_torch.py --weights maskgil.safetensors --labels 1,2 --out tokens.npz

It needs nothing of this repository: torch, NumPy and safetensors only. Both layouts are read, the
paper's (`maskgil`) and that of the released code (`maskgil-released`); decoding is the masked
schedule with guidance that `python -m maskgil_jax.sample` runs, with the same defaults.

Reference: MaskGIL sections 3.1 and 3.2; MaskGIT (Chang et al., 2022), section 3.
"""

import argparse
import dataclasses
import math
import pickle
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

# (layers, width) -> heads of the published sizes: heads leave no trace in the shapes.
HEADS = {(12, 768): 12, (24, 1024): 16, (36, 1280): 20, (48, 1536): 24}
WRAPPERS = ("ema", "model", "model_state_dict", "state_dict")
BUFFERS = ("freqs_cis", "causal_mask")
SCHEDULES = ("root", "linear", "cosine", "square", "arccos")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Shape and options of a class-conditional MaskGIL, named as in `maskgil_jax.models.maskgil`.

    Attributes:
        codebook_size: number of image codes K; K itself is the mask token.
        num_classes: number of classes C; label C means "no condition".
        grid_size: rows and columns of tokens.
        condition: whether the class token stands `first` or `last`.
        rope: rotary table over the grid (`2d`) or over raster positions (`1d`).
        cond_rope: row of the class token: `identity`, `zero`, or `table` (one zero row in front of
            a 1D table, whichever token that meets).
        embeddings: `separate` tables, or one `shared`: codes, mask, classes, null class.
        qk_norm: `none`, `layer` or `rms`, of queries and keys over the head dimension.
        post_norm: `none`, `layer` or `rms`, of the outputs of attention and MLP.
    """

    num_layers: int
    width: int
    num_heads: int
    mlp_width: int
    codebook_size: int
    num_classes: int
    grid_size: tuple[int, int] = (16, 16)
    condition: str = "first"
    rope: str = "2d"
    cond_rope: str = "identity"
    rope_base: float = 10000.0
    embeddings: str = "separate"
    qk_norm: str = "none"
    post_norm: str = "none"
    norm_eps: float = 1e-5
    dropout: float = 0.0

    @property
    def seq_len(self) -> int:
        """Number of image tokens."""
        return math.prod(self.grid_size)


RELEASED = {"condition": "last", "rope": "1d", "cond_rope": "table", "embeddings": "shared"}


def rope_table(config: Config) -> torch.Tensor:
    """Return cos and sin of every position of the sequence, float32 [l + 1, head_dim/2, 2]."""
    pairs = config.width // config.num_heads // 2
    gh, gw = config.grid_size

    def angles(positions: torch.Tensor, count: int) -> torch.Tensor:
        powers = torch.arange(count, dtype=torch.float64) / count
        return torch.outer(positions.double(), config.rope_base**-powers)

    if config.rope == "2d":
        rows = angles(torch.arange(gh), pairs // 2).repeat_interleave(gw, 0)
        columns = angles(torch.arange(gw), pairs // 2).repeat(gh, 1)
        image = torch.cat((rows, columns), 1)
    else:
        image = angles(torch.arange(gh * gw), pairs)
    table = torch.stack((image.cos(), image.sin()), -1).float()
    token = torch.zeros(1, pairs, 2)
    token[..., 0] = config.cond_rope == "identity"
    ahead = config.condition == "first" or config.cond_rope == "table"
    return torch.cat((token, table) if ahead else (table, token))


def make_norm(kind: str, width: int, eps: float) -> nn.Module:
    """Return a norm with a scale and no bias; `none` is the identity."""
    if kind == "none":
        return nn.Identity()
    return nn.RMSNorm(width, eps=eps) if kind == "rms" else nn.LayerNorm(width, eps, bias=False)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate the interleaved channel pairs of x [b, h, l, d] by a table [l, d/2] each."""
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack((even * cos - odd * sin, odd * cos + even * sin), dim=-1)
    return turned.flatten(-2).to(x.dtype)


class Block(nn.Module):
    """One layer: attention and MLP, each pre-normalised, optionally post-normalised."""

    def __init__(self, config: Config):
        super().__init__()
        e, f, eps = config.width, config.mlp_width, config.norm_eps
        head_dim = e // config.num_heads
        self.num_heads, self.dropout = config.num_heads, config.dropout
        self.attention_norm = make_norm("rms", e, eps)
        self.qkv = nn.Linear(e, 3 * e, bias=False)
        self.q_norm = make_norm(config.qk_norm, head_dim, eps)
        self.k_norm = make_norm(config.qk_norm, head_dim, eps)
        self.out = nn.Linear(e, e, bias=False)
        self.attention_post_norm = make_norm(config.post_norm, e, eps)
        self.mlp_norm = make_norm("rms", e, eps)
        self.mlp_post_norm = make_norm(config.post_norm, e, eps)
        self.gate_up = nn.Linear(e, 2 * f, bias=False)
        self.down = nn.Linear(f, e, bias=False)

    def attend(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """Attend from every position to all of them."""
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        q, k = rotate(self.q_norm(q), cos, sin), rotate(self.k_norm(k), cos, sin)
        y = F.scaled_dot_product_attention(q.to(v.dtype), k.to(v.dtype), v)
        return self.out(y.transpose(1, 2).flatten(2))

    def feed_forward(self, x: torch.Tensor) -> torch.Tensor:
        """Apply the gated MLP."""
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """Return the residual stream [b, l, e] behind this layer."""
        y = self.attention_post_norm(self.attend(self.attention_norm(x), cos, sin))
        x = x + F.dropout(y, self.dropout, self.training)
        y = self.mlp_post_norm(self.feed_forward(self.mlp_norm(x)))
        return x + F.dropout(y, self.dropout, self.training)


class TorchMaskGIL(nn.Module):
    """MaskGIL with one class token: tokens and labels in, logits out."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        rows, labels = config.codebook_size + 1, config.num_classes + 1
        shared = config.embeddings == "shared"
        self.token_embed = nn.Embedding(rows + labels if shared else rows, config.width)
        self.label_embed = None if shared else nn.Embedding(labels, config.width)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm = nn.RMSNorm(config.width, eps=config.norm_eps)
        self.head = nn.Linear(config.width, rows, bias=False)
        for parameter in self.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.02)
        table = rope_table(config)
        self.register_buffer("cos", table[..., 0].contiguous(), persistent=False)
        self.register_buffer("sin", table[..., 1].contiguous(), persistent=False)

    def forward(self, tokens: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Return logits [b, gh·gw, K+1] for tokens [b, gh, gw] and labels [b]."""
        if self.label_embed is None:
            condition = self.token_embed(self.config.codebook_size + 1 + labels)
        else:
            condition = self.label_embed(labels)
        parts = [condition[:, None], self.token_embed(tokens.flatten(1))]
        first = self.config.condition == "first"
        x = torch.cat(parts if first else parts[::-1], 1)
        for layer in self.layers:
            x = layer(x, self.cos, self.sin)
        return self.head(self.norm(x)[:, 1:] if first else self.norm(x)[:, :-1])


# Our names -> those of the checkpoints; `gate_up` is `w1` above `w3`.
_TOP = {"norm": "norm", "head": "output"}
_LAYER = {
    "attention_norm": "attention_norm",
    "qkv": "attention.wqkv",
    "q_norm": "attention.q_norm",
    "k_norm": "attention.k_norm",
    "out": "attention.wo",
    "attention_post_norm": "attention_post_norm",
    "mlp_norm": "ffn_norm",
    "mlp_post_norm": "ffn_post_norm",
    "down": "feed_forward.w2",
}


def infer_config(
    state: Mapping[str, torch.Tensor],
    *,
    num_heads: int | None = None,
    grid_size: tuple[int, int] = (16, 16),
    cond_rope: str = "zero",
    qk_norm: str = "layer",
    post_norm: str = "rms",
) -> Config:
    """Read a model's sizes off the shapes of its checkpoint.

    Args:
        state: checkpoint key -> tensor.
        num_heads: needed where (layers, width) is no published size.
        grid_size: rows and columns of tokens, which shapes do not tell.
        cond_rope: `zero` or `identity`; the released layout has its own.
        qk_norm: kind of the query and key norms, if the file has such.
        post_norm: kind of the post-norms, if the file has such.

    Raises:
        ValueError: tensors are missing, or the number of heads is not told.
    """
    released = "tok_emb.weight" in state
    table = "tok_emb.weight" if released else "tok_embeddings.weight"
    needed = [table, "output.weight", "layers.0.feed_forward.w1.weight"]
    needed += [] if released else ["cls_embedding.embedding_table.weight"]
    if missing := [key for key in needed if key not in state]:
        raise ValueError(f"no MaskGIL checkpoint: {', '.join(missing)} missing")
    layers = 1 + max(int(key.split(".")[1]) for key in state if key.startswith("layers."))
    width, rows = state[table].shape[1], state["output.weight"].shape[0]
    has_qk = "layers.0.attention.q_norm.weight" in state
    if num_heads is None and has_qk:
        num_heads = width // state["layers.0.attention.q_norm.weight"].shape[0]
    if num_heads is None and (layers, width) not in HEADS:
        raise ValueError(
            f"the shapes do not tell the number of heads, and {layers} layers of width {width} are "
            f"no published size {sorted(HEADS)}; give num_heads (--num_heads)"
        )
    if released:
        classes = state[table].shape[0] - rows - 1
        layout: dict[str, Any] = dict(RELEASED)
    else:
        classes = state["cls_embedding.embedding_table.weight"].shape[0] - 1
        layout = {"cond_rope": cond_rope}
    return Config(
        num_layers=layers,
        width=width,
        num_heads=num_heads or HEADS[layers, width],
        mlp_width=state["layers.0.feed_forward.w1.weight"].shape[0],
        codebook_size=rows - 1,
        num_classes=classes,
        grid_size=grid_size,
        qk_norm=qk_norm if has_qk else "none",
        post_norm=post_norm if "layers.0.ffn_post_norm.weight" in state else "none",
        **layout,
    )


def load_weights(model: TorchMaskGIL, state: Mapping[str, torch.Tensor]) -> None:
    """Copy a checkpoint into a model; every tensor of either must be in the other.

    Raises:
        RuntimeError: keys or shapes differ.
    """
    table = "tok_emb" if model.config.embeddings == "shared" else "tok_embeddings"
    names = {"token_embed": table, "label_embed": "cls_embedding.embedding_table", **_TOP}
    names = {f"{ours}.weight": f"{theirs}.weight" for ours, theirs in names.items()}
    left = {key: value for key, value in state.items() if key not in BUFFERS}
    for i in range(model.config.num_layers):
        names |= {f"layers.{i}.{a}.weight": f"layers.{i}.{b}.weight" for a, b in _LAYER.items()}
        gates = [f"layers.{i}.feed_forward.{w}.weight" for w in ("w1", "w3")]
        if all(gate in left for gate in gates):
            left[f"layers.{i}.gate_up.weight"] = torch.cat([left.pop(gate) for gate in gates])
    renamed = {ours: left.pop(theirs) for ours, theirs in names.items() if theirs in left}
    model.load_state_dict(renamed | left, strict=True)


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """Read a `.safetensors`, `.pt` or `.pth` file, a pickle by plain tensors alone.

    Raises:
        ValueError: the file is damaged or holds anything else.
    """
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        saved = torch.load(path, weights_only=True, map_location="cpu")
    except (pickle.UnpicklingError, safetensors.SafetensorError, EOFError) as error:
        raise ValueError(f"{path} is damaged or holds more than tensors: {error}") from error
    return next((saved[name] for name in WRAPPERS if name in saved), saved)


def load_model(path: Path, **options) -> TorchMaskGIL:
    """Return the model of a checkpoint, for inference; options as in `infer_config`."""
    state = read_weights(path)
    model = TorchMaskGIL(infer_config(state, **options))
    load_weights(model, state)
    return model.eval()


def reveal_counts(schedule: str, num_steps: int, seq_len: int) -> list[int]:
    """Return how many tokens each step reveals: the curve itself, scaled to `seq_len`.

    Raises:
        ValueError: an unknown schedule, or a number of steps out of range.
    """
    curves = {
        "root": lambda r: 1 - np.sqrt(r),
        "linear": lambda r: 1 - r,
        "square": lambda r: 1 - r**2,
        "cosine": lambda r: np.cos(r * (math.pi / 2)),
        "arccos": lambda r: np.arccos(r) / (math.pi / 2),
    }
    if schedule not in curves:
        raise ValueError(f"schedule {schedule!r} is unknown; allowed: {', '.join(curves)}")
    if not 1 <= num_steps <= seq_len:
        raise ValueError(f"num_steps {num_steps} is out of range; allowed: 1 to {seq_len}")
    progress = 1 - np.arange(num_steps) / max(num_steps - 1, 1)
    weights = np.clip(curves[schedule](progress), 0, 1) if num_steps > 1 else np.ones(1)
    counts = np.maximum(np.round(weights / weights.sum() * seq_len), 1).astype(int)
    known = np.minimum(np.cumsum(counts), seq_len)
    known[-1] = seq_len
    return np.diff(known, prepend=0).tolist()


def gumbel_noise(like: torch.Tensor, generator: torch.Generator | None) -> torch.Tensor:
    """Draw standard Gumbel noise of a tensor's shape, the same on every device."""
    uniform = torch.rand(like.shape, dtype=torch.float64, generator=generator)
    # Away from 0 and 1, where the logarithms are infinite.
    noise = -torch.log(-torch.log(uniform.clamp(1e-300, 1 - 1e-16)))
    return noise.to(like)


@torch.inference_mode()
def generate(
    model: TorchMaskGIL,
    labels: torch.Tensor,
    *,
    num_steps: int = 8,
    schedule: str = "arccos",
    guidance_scale: float = 2.0,
    temperature: float = 1.0,
    gumbel_temperature: float = 4.5,
    generator: torch.Generator | None = None,
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Generate codes by repeatedly keeping the most confident predictions.

    Args:
        model: in evaluation mode.
        labels: classes [b].
        num_steps: T, 1 to the number of tokens.
        schedule: one of `SCHEDULES`.
        guidance_scale: s; the scale of step i is 1 + (s - 1)·i/(T - 1).
        temperature: divides the logits; 0 takes the most probable code.
        gumbel_temperature: weight of the noise on the confidence in the first step.
        generator: of the noise.

    Returns:
        int64 codes [b, gh, gw], and the tokens after every step.
    """
    config, b = model.config, len(labels)
    mask_id = config.codebook_size
    tokens = labels.new_full((b, *config.grid_size), mask_id)
    nothing = torch.full_like(labels, config.num_classes)
    history = []
    for step, count in enumerate(reveal_counts(schedule, num_steps, config.seq_len)):
        ramp = step / (num_steps - 1) if num_steps > 1 else 1.0
        logits = model(tokens, labels)
        if (scale := 1 + (guidance_scale - 1) * ramp) != 1:
            without = model(tokens, nothing)
            logits = without + scale * (logits - without)
        # Logits end before the mask token: it can never be drawn.
        logits = logits[..., :mask_id].float()
        if temperature == 0:
            codes, log_probs = logits.argmax(-1), logits.log_softmax(-1)
        else:
            log_probs = (logits / temperature).log_softmax(-1)
            codes = (log_probs + gumbel_noise(log_probs, generator)).argmax(-1)
        confidence = log_probs.gather(-1, codes[..., None])[..., 0]
        fade = 1 - ramp if num_steps > 1 else 0.0
        noise = gumbel_noise(confidence, generator)
        confidence = confidence + gumbel_temperature * fade * noise
        confidence[tokens.flatten(1) != mask_id] = -torch.inf
        chosen = confidence.sort(dim=-1, descending=True, stable=True).indices[:, :count]
        tokens = tokens.flatten(1).scatter(1, chosen, codes.gather(1, chosen)).view_as(tokens)
        history.append(tokens)
    return tokens, history


def parse_labels(text: str) -> list[int]:
    """Read `1,2,3`."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: write labels as 1,2,3") from error


def parse_grid(text: str) -> tuple[int, int]:
    """Read `16x16` as (rows, columns)."""
    rows, _, columns = text.partition("x")
    if not (rows.isdecimal() and columns.isdecimal()):
        raise argparse.ArgumentTypeError(f"{text!r} is no grid size; write rows x columns: 16x16")
    return int(rows), int(columns)


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--weights", required=True, type=Path, help="exported .safetensors, .pt or .pth file")
    add("--labels", required=True, type=parse_labels, help="classes, e.g. 1,2,3")
    add("--out", required=True, type=Path, help=".npz to write: tokens [b, gh, gw] and labels [b]")
    add("--num_heads", type=int, help="where the size is no published one")
    add("--grid_size", type=parse_grid, default=(16, 16), help="rows x columns (default 16x16)")
    add("--cond_rope", choices=("zero", "identity"), default="zero")
    add("--qk_norm", choices=("layer", "rms"), default="layer", help="if the file has such norms")
    add("--post_norm", choices=("layer", "rms"), default="rms", help="if the file has such norms")
    add("--num_steps", type=int, default=8)
    add("--schedule", choices=SCHEDULES, default="arccos")
    add("--guidance_scale", type=float, default=2.0, help="of the last step; 1 is no guidance")
    add("--temperature", type=float, default=1.0, help="0 takes the most probable code")
    add("--gumbel_temperature", type=float, default=4.5, help="noise on the confidence")
    add("--seed", type=int, default=0)
    add("--device", default="cpu")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Generate tokens; return the exit status."""
    args = build_parser().parse_args(arguments)
    try:
        names = ("num_heads", "grid_size", "cond_rope", "qk_norm", "post_norm")
        model = load_model(args.weights, **{name: getattr(args, name) for name in names})
        classes = model.config.num_classes
        if wrong := [label for label in args.labels if not 0 <= label < classes]:
            raise ValueError(f"labels {wrong} are out of range; allowed: 0 to {classes - 1}")
        names = ("num_steps", "schedule", "guidance_scale", "temperature", "gumbel_temperature")
        labels = torch.tensor(args.labels, device=args.device)
        tokens, _ = generate(
            model.to(args.device),
            labels,
            generator=torch.Generator().manual_seed(args.seed),
            **{name: getattr(args, name) for name in names},
        )
        codes = tokens.cpu().numpy().astype(np.int32)
        np.savez(args.out, tokens=codes, labels=np.array(args.labels))
    except (ValueError, OSError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"wrote {args.out}: tokens {list(tokens.shape)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
