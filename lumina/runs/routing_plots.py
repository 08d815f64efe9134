"""Plots of a run's routing, as PNG files for a light and a dark page.

S log steps, L layers, A alternatives, E experts, n parts of a row.
"""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lumina.architecture import depth_capacity_at
from lumina.config import Config
from lumina.errors import UsageError
from lumina.runs.routing import History

MAP = "viridis"  # perceptually uniform, and told apart by those who see few colours
NONE = "#e4572e"  # of an expert without a token, a colour that is not in the map
DOTS = 150  # an inch
WIDTH = 6.4  # inches: narrow, so that the lettering is read on a phone
LEGENDS = 8  # layers that a legend names; a colour bar stands for more


class Theme(NamedTuple):
    """Colours of a page, and what its files end with."""

    suffix: str
    paper: str
    ink: str
    faint: str


THEMES = (Theme("", "#ffffff", "#1d2330", "#c9ced8"), Theme("-dark", "#171b24", "#e3e7ef", "#454c5c"))


def require_matplotlib() -> None:
    """Raise a UsageError that names the extra, before anything expensive."""
    if importlib.util.find_spec("matplotlib") is None:
        raise UsageError("matplotlib is not installed; the page's plots need it: pip install 'lumina[plots]', or use --json")


def draw(out: Path, history: History, config: Config, position_Ln: np.ndarray | None) -> list[str]:
    """Draw all that there is to see; returns the names, without suffix and ending, of the plots in `out`."""
    plots: dict[str, Callable[[Any, Theme], None]] = {}
    if history.steps and history.moe_layers:
        plots["load"] = lambda figure, theme: _load(figure, theme, history)
        plots["experts"] = lambda figure, theme: _experts(figure, theme, history)
    if history.steps and history.mod_layers:
        plots["depth"] = lambda figure, theme: _depth(figure, theme, history, config)
    if position_Ln is not None and position_Ln.size:
        plots["position"] = lambda figure, theme: _position(figure, theme, history.mod_layers, position_Ln, config)
    for name, plot in plots.items():
        for theme in THEMES:
            _save(out / f"{name}{theme.suffix}.png", theme, plot)
    return list(plots)


def _save(path: Path, theme: Theme, plot: Callable[[Any, Theme], None]) -> None:
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    style: Any = {
        "font.size": 10,
        "axes.titlesize": 10.5,
        "axes.titlelocation": "left",
        "axes.titlepad": 7.0,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.edgecolor": theme.faint,
        "figure.facecolor": theme.paper,
        "axes.facecolor": theme.paper,
        "legend.frameon": False,
        "savefig.facecolor": theme.paper,
        **dict.fromkeys(("text.color", "axes.labelcolor", "axes.titlecolor", "xtick.color", "ytick.color"), theme.ink),
    }
    with matplotlib.rc_context(style):
        figure = Figure(layout="constrained")
        canvas = FigureCanvasAgg(figure)  # no display, whatever the user's own settings
        plot(figure, theme)
        canvas.print_figure(path, dpi=DOTS, format="png")


# ----------------------------------------------------------------------------------------------------------- experts


def _load(figure: Any, theme: Theme, history: History) -> None:
    """A panel a layer: the load of each alternative at each log step, over a uniform share."""
    from matplotlib import colormaps

    A, L = history.load_SLA.shape[-1], len(history.moe_layers)
    columns = 1 if L <= 6 else 2 if L <= 24 else 3
    rows = -(-L // columns)
    height = min(max(0.17 * A, 1.0), 3.0 if columns == 1 else 1.7)
    figure.set_size_inches(WIDTH if columns < 3 else 1.4 * WIDTH, 0.95 + rows * (height + 0.45))
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    relative_SLA = history.load_SLA * A
    highest = max(2.0, float(np.nanquantile(relative_SLA, 0.995)))
    palette = colormaps[MAP].with_extremes(under=NONE)
    for place, panel in enumerate(panels.flat):
        if place >= L:
            panel.set_visible(False)
            continue
        image = panel.pcolormesh(
            _edges(history.steps),
            np.arange(A + 1) - 0.5,
            np.ma.masked_invalid(relative_SLA[:, place].T),
            cmap=palette,
            vmin=1e-9,  # nothing at all is below it
            vmax=highest,
            rasterized=True,
        )
        panel.set_title(f"layer {history.moe_layers[place]}")
        panel.set_yticks(*_alternatives(A, history.num_experts, round(6.5 * height)))
        panel.invert_yaxis() if place == 0 else None  # shared by all
        panel.tick_params(length=2)
        panel.spines[:].set_visible(False)
    for panel in panels[:, 0]:
        panel.set_ylabel("expert")
    for column in range(columns):
        last = max(row for row in range(rows) if row * columns + column < L)
        panels[last, column].set_xlabel("step")
        panels[last, column].tick_params(labelbottom=True)
        _whole_steps(panels[last, column], most=8 // columns)
    pad = 0.12 / (rows * (height + 0.45))
    bar = figure.colorbar(image, ax=panels, location="top", aspect=45, extend="min", extendfrac=0.04, pad=pad)
    bar.ax.xaxis.set_major_locator(_whole_numbers(8))
    bar.ax.axvline(1, color="white", linewidth=1.6)
    bar.set_label("load over a uniform share (white: 1, uniform; orange: no token)")
    bar.outline.set_visible(False)


def _alternatives(A: int, E: int, room: int) -> tuple[list[int], list[str]]:
    """Places and names of `room` alternatives at most; those beyond the experts do no work."""
    every = max(1, -(-A // room))
    places = [a for a in range(A) if a % every == 0]
    return places, [str(a) if a < E else f"no-op {a - E}" for a in places]


def _experts(figure: Any, theme: Theme, history: History) -> None:
    """Drops, entropy and the busiest expert's load over time, a line a layer."""
    figure.set_size_inches(WIDTH, 6.6)
    panels = figure.subplots(3, 1, sharex=True)
    parts = (
        ("dropped choices", 100 * history.dropped_SL, "% of choices", None),
        ("entropy of the router's scores", history.entropy_SL, "of uniform", (1.0, "uniform")),
        ("load of the busiest expert", history.peak_SL, "times the mean", (1.0, "uniform")),
    )
    for panel, (title, values_SL, unit, mark) in zip(panels, parts, strict=True):
        _lines(panel, theme, history.steps, history.moe_layers, values_SL)
        panel.set_title(title)
        panel.set_ylabel(unit)
        if mark:
            _mark(panel, theme, *mark, above=panel is panels[1])
    panels[0].set_ylim(bottom=0, top=max(1.0, 105 * float(np.nanmax(history.dropped_SL))))
    panels[1].set_ylim(0, 1.15)
    panels[2].set_ylim(bottom=0)
    panels[-1].set_xlabel("step")
    _whole_steps(panels[-1])
    _name_layers(figure, panels, history.moe_layers)


# ------------------------------------------------------------------------------------------------------------- depth


def _depth(figure: Any, theme: Theme, history: History, config: Config) -> None:
    """Share of tokens that the causal decision takes, layer by step, and how often it agrees with the top-k."""
    L = len(history.mod_layers)
    height = min(max(0.32 * L, 1.0), 5.0)
    figure.set_size_inches(WIDTH, height + 3.9)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(height, 2.0))
    wanted = depth_capacity_at(config.model.mod, max(history.steps[-1] - 1, 0))
    _layers_map(figure, above, height, history.mod_layers, _edges(history.steps), history.capacity_SL.T, wanted)
    above.set_title("tokens that take each layer, by the causal decision")
    _lines(below, theme, history.steps, history.mod_layers, 100 * history.agreement_SL)
    below.set_title("agreement of that decision with the top-k of training")
    below.set_ylabel("% of tokens")
    below.set_ylim(min(50.0, 100 * float(np.nanmin(history.agreement_SL)) - 5), 101)
    _mark(below, theme, 100 * max(wanted, 1 - wanted), "always deciding the same")
    below.set_xlabel("step")
    _whole_steps(below)
    _name_layers(figure, below, history.mod_layers)


def _position(figure: Any, theme: Theme, layers: list[int], position_Ln: np.ndarray, config: Config) -> None:
    """Share of tokens that take each layer, by place in the row."""
    L, n = position_Ln.shape
    height = min(max(0.32 * L, 1.0), 5.0)
    figure.set_size_inches(WIDTH, height + 1.5)
    panel = figure.subplots()
    T = config.data.sequence_length
    _layers_map(figure, panel, height, layers, np.linspace(0, T, n + 1), position_Ln, config.model.mod.capacity)
    panel.set_title("tokens that take each layer, by place in the row (held-out text)")
    panel.set_xlabel("position in the row")


def _layers_map(
    figure: Any, panel: Any, height: float, layers: list[int], edges: np.ndarray, share: np.ndarray, wanted: float
) -> None:
    """A row a layer; `edges` between the columns, `share` from 0 to 1, `wanted` marked in the colour bar."""
    image = panel.pcolormesh(edges, np.arange(len(layers) + 1) - 0.5, 100 * share, cmap=MAP, vmin=0, vmax=100, rasterized=True)
    every = max(1, -(-len(layers) // 16))
    panel.set_yticks(range(0, len(layers), every), labels=[str(layer) for layer in layers[::every]])
    panel.invert_yaxis()
    panel.set_ylabel("layer")
    panel.tick_params(length=2)
    panel.spines[:].set_visible(False)
    bar = figure.colorbar(image, ax=panel, location="top", aspect=45, pad=0.14 / height)
    bar.ax.axvline(100 * wanted, color="white", linewidth=1.6)
    bar.set_label(f"% of tokens; white: the capacity that is set, {100 * wanted:.3g}%")
    bar.outline.set_visible(False)


# ------------------------------------------------------------------------------------------------------------- parts


def _edges(steps: list[int]) -> np.ndarray:
    """Between which steps each log step is drawn: half way to its neighbours."""
    if len(steps) == 1:
        return np.array([steps[0] - 0.5, steps[0] + 0.5])
    steps_S = np.array(steps, float)
    middle = (steps_S[1:] + steps_S[:-1]) / 2
    return np.array([steps_S[0] - (middle[0] - steps_S[0]), *middle, steps_S[-1] + (steps_S[-1] - middle[-1])])


def _whole_numbers(most: int) -> Any:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(most, integer=True, steps=[1, 2, 5, 10])


def _whole_steps(panel: Any, most: int = 8) -> None:
    panel.xaxis.set_major_locator(_whole_numbers(most))


def _colours(count: int) -> list[Any]:
    """A colour a layer, from the middle of the map: both ends fade into a page."""
    from matplotlib import colormaps

    return [colormaps[MAP](0.3 + 0.6 * place / max(count - 1, 1)) for place in range(count)]


def _lines(panel: Any, theme: Theme, steps: list[int], layers: list[int], values_SL: np.ndarray) -> None:
    for place, (layer, colour) in enumerate(zip(layers, _colours(len(layers)), strict=True)):
        marker = "o" if len(steps) < 12 else None
        panel.plot(steps, values_SL[:, place], color=colour, linewidth=1.6, marker=marker, markersize=3, label=f"layer {layer}")
    panel.grid(axis="y", color=theme.faint, linewidth=0.6, alpha=0.7)
    panel.margins(x=0.01)
    panel.tick_params(length=2)


def _mark(panel: Any, theme: Theme, value: float, says: str, above: bool = False) -> None:
    """A dashed line, and what it stands for below it, or above it."""
    panel.axhline(value, color=theme.ink, linewidth=1, linestyle=(0, (4, 3)), alpha=0.7)
    panel.annotate(
        says,
        (1, value),
        xycoords=("axes fraction", "data"),
        xytext=(-4, 2 if above else -3),
        textcoords="offset points",
        ha="right",
        va="bottom" if above else "top",
        fontsize=8.5,
        color=theme.ink,
        alpha=0.85,
    )


def _name_layers(figure: Any, panels: Any, layers: list[int]) -> None:
    """Which line is which layer: a legend, or where that would be long a colour bar."""
    if len(layers) <= LEGENDS:
        lines, names = np.ravel(panels)[0].get_legend_handles_labels()
        figure.legend(lines, names, loc="outside lower center", ncols=min(len(layers), 4), fontsize=9, handlelength=1.4)
        return
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import ListedColormap, Normalize

    scale = ScalarMappable(Normalize(layers[0], layers[-1]), ListedColormap(_colours(64)))
    bar = figure.colorbar(scale, ax=panels, aspect=40, pad=0.02)
    bar.set_label("layer")
    bar.outline.set_visible(False)
