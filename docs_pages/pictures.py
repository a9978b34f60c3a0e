"""The pictures of docs/lora.md, drawn from the project's own sizes and constants."""

import io
from collections.abc import Callable

import matplotlib
import torch

matplotlib.use("Agg")

from matplotlib import pyplot  # noqa: E402  after the choice of a backend that needs no window
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.patches import Rectangle  # noqa: E402

from custom_components.models import nf4  # noqa: E402
from custom_components.models.shapes import LLAMA2_7B, LlamaShape  # noqa: E402
from docs_pages.blocks import DOCS  # noqa: E402

_BLUE, _ORANGE, _GREY = "#3d6fb4", "#d9822b", "#8c8c8c"


def low_rank_update(axes: Axes) -> None:
    """W is large and frozen; B and A are thin and trained."""
    axes.set(xlim=(0, 11.5), ylim=(-0.6, 4.9), aspect="equal")
    axes.axis("off")
    for left, bottom, width, height, colour, words in (
        (0.0, 0.0, 4.0, 4.0, _GREY, "W\n4096 × 4096\nfrozen"),
        (6.0, 0.0, 0.5, 4.0, _ORANGE, "B"),
        (7.3, 3.5, 4.0, 0.5, _ORANGE, "A"),
    ):
        axes.add_patch(Rectangle((left, bottom), width, height, facecolor=colour, edgecolor="none"))
        axes.text(left + width / 2, bottom + height / 2, words, ha="center", va="center", color="white", fontsize=11)
    axes.text(5.0, 2.0, r"$+\ \dfrac{\alpha}{r}$", ha="center", va="center", fontsize=15)
    axes.text(6.25, -0.35, "4096 × r", ha="center", va="center", fontsize=9)
    axes.text(9.3, 3.15, "r × 4096", ha="center", va="center", fontsize=9)
    axes.text(9.3, 1.4, "r = 16: 131,072 numbers trained\nin the place of 16,777,216", ha="center", fontsize=10)


def trained_parameters(axes: Axes) -> None:
    """How many parameters each choice trains on Llama 2 7B."""
    ranks = [4, 8, 16, 32, 64, 128]
    for words, projections, colour in (
        ("all linear layers", ("q", "k", "v", "o", "gate", "up", "down"), _BLUE),
        ("q, k, v, o", ("q", "k", "v", "o"), _GREY),
        ("q, v", ("q", "v"), _ORANGE),
    ):
        counts = [adapter_parameters(LLAMA2_7B, projections, rank) / 1e6 for rank in ranks]
        axes.plot(ranks, counts, marker="o", color=colour, label=words)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(ranks, map(str, ranks))
    axes.set(xlabel="rank r", ylabel="trained parameters, millions")
    axes.legend(frameon=False)
    axes.grid(alpha=0.3)


def nf4_levels(axes: Axes) -> None:
    """NF4's 16 values lie where normally distributed weights are."""
    levels = nf4.codebook(torch.device("cpu")).tolist()
    xs = torch.linspace(-1, 1, 401)
    sigma = 0.36  # so that the largest of a block of 64 normal values is about 1
    density = torch.exp(-0.5 * (xs / sigma) ** 2)
    axes.fill_between(xs.tolist(), density.tolist(), color=_GREY, alpha=0.3, label="weights of a block")
    axes.vlines(levels, 0, 0.5, color=_BLUE, label="NF4: 16 values")
    axes.vlines(
        [-1 + 2 * index / 15 for index in range(16)], -0.5, 0, color=_ORANGE, label="evenly spaced 4-bit values"
    )
    axes.set(xlabel="weight / largest of its block of 64", yticks=[], ylim=(-0.6, 1.25))
    axes.legend(frameon=False, loc="upper left", fontsize=8)


def bytes_of_a_run(axes: Axes) -> None:
    """What must be kept for a training step of Llama 2 7B, besides activations."""
    num_weights = model_parameters(LLAMA2_7B)
    num_linear = LLAMA2_7B.num_layers * sum(linear_sizes(LLAMA2_7B).values())
    num_adapter = adapter_parameters(LLAMA2_7B, tuple(linear_sizes(LLAMA2_7B)), 16)
    nf4_bytes = 4.127 / 8 * num_linear + 2 * (num_weights - num_linear)
    # Weights; trained copies and gradients in fp32 with Adam's two moments: 16 bytes for each trained number.
    rows = {
        "QLoRA, r = 16": (nf4_bytes, 16 * num_adapter),
        "LoRA, r = 16": (2 * num_weights, 16 * num_adapter),
        "full fine-tuning": (2 * num_weights, 16 * num_weights),
    }
    weights = [values[0] / 2**30 for values in rows.values()]
    trained = [values[1] / 2**30 for values in rows.values()]
    axes.barh(list(rows), weights, color=_GREY, label="16-bit or 4-bit weights")
    axes.barh(list(rows), trained, left=weights, color=_ORANGE, label="trained: fp32, gradient, Adam")
    for number, (weight, more) in enumerate(zip(weights, trained, strict=True)):
        axes.text(weight + more + 1, number, f"{weight + more:.1f} GiB", va="center", fontsize=9)
    axes.set(xlabel="GiB", xlim=(0, 135))
    axes.legend(frameon=False, loc="lower right", fontsize=8)


def dora_row(axes: Axes) -> None:
    """LoRA moves the tip of a row of W; DoRA learns its length and its direction apart."""
    axes.set(xlim=(-0.3, 4.4), ylim=(-0.3, 3.0), aspect="equal")
    axes.axis("off")
    arrow = {"arrowstyle": "-|>", "lw": 2, "shrinkA": 0, "shrinkB": 0}
    tip, moved = (3.0, 0.8), (2.6, 2.0)
    length = (tip[0] ** 2 + tip[1] ** 2) ** 0.5
    scale = 1.15 * length / (moved[0] ** 2 + moved[1] ** 2) ** 0.5
    learned = (moved[0] * scale, moved[1] * scale)
    for start, end, colour in (((0, 0), tip, _GREY), (tip, moved, _ORANGE), ((0, 0), learned, _BLUE)):
        axes.annotate("", end, start, arrowprops={**arrow, "color": colour})
    axes.plot([0, moved[0]], [0, moved[1]], color=_ORANGE, lw=1, ls="--")
    axes.text(2.1, 0.25, "row of W", color=_GREY)
    axes.text(3.0, 1.4, "s B A, learned by LoRA", color=_ORANGE)
    axes.text(learned[0] - 1.7, learned[1] + 0.1, "DoRA: this direction, length m", color=_BLUE)


def linear_sizes(shape: LlamaShape) -> dict[str, int]:
    """Count the weights of each linear projection of a layer."""
    return {name: in_dim * out_dim for name, (in_dim, out_dim) in _dims(shape).items()}


def adapter_parameters(shape: LlamaShape, projections: tuple[str, ...], rank: int) -> int:
    """Count what adapters on these projections of every layer train: r (d_in + d_out) each."""
    dims = _dims(shape)
    return shape.num_layers * rank * sum(sum(dims[name]) for name in projections)


def model_parameters(shape: LlamaShape) -> int:
    """Count all parameters of a model with an embedding and a head."""
    norms = (2 * shape.num_layers + 1) * shape.embed_dim
    return shape.num_layers * sum(linear_sizes(shape).values()) + 2 * shape.vocab_size * shape.embed_dim + norms


def _dims(shape: LlamaShape) -> dict[str, tuple[int, int]]:
    dim, hidden, kv_dim = shape.embed_dim, shape.intermediate_dim, shape.num_kv_heads * shape.head_dim
    return {
        **{"q": (dim, dim), "k": (dim, kv_dim), "v": (dim, kv_dim), "o": (dim, dim)},
        **{"gate": (dim, hidden), "up": (dim, hidden), "down": (hidden, dim)},
    }


PICTURES: dict[str, tuple[Callable[[Axes], None], tuple[float, float]]] = {
    "low_rank_update": (low_rank_update, (6.4, 3.0)),
    "trained_parameters": (trained_parameters, (6.0, 3.4)),
    "nf4_levels": (nf4_levels, (6.4, 3.0)),
    "bytes_of_a_run": (bytes_of_a_run, (6.4, 2.2)),
    "dora_row": (dora_row, (5.2, 3.4)),
}


def drawn(name: str) -> str:
    """Draw a picture as SVG."""
    draw, size = PICTURES[name]
    with matplotlib.rc_context({"svg.hashsalt": name, "svg.fonttype": "path", "font.size": 10}):
        figure, axes = pyplot.subplots(figsize=size, layout="constrained")
        figure.patch.set_facecolor("white")
        draw(axes)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
        pyplot.close(figure)
    return "\n".join(line.rstrip() for line in buffer.getvalue().splitlines()) + "\n"


def write_pictures() -> None:
    (DOCS / "pictures").mkdir(exist_ok=True)
    for name in PICTURES:
        (DOCS / f"pictures/{name}.svg").write_text(drawn(name), encoding="utf-8")
