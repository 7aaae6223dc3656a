"""What all figures have in common."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def new_figure(width: float, height: float) -> "Figure":
    """An empty figure of so many inches, for which there need not be a display.

    Matplotlib is imported here, when something is drawn: that takes as long as importing JAX.
    """
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def steps_taken(number: int) -> str:
    """How a legend says after how many adaptation steps something is."""
    return "before adaptation" if number == 0 else f"after {number} step{'s' * (number != 1)}"


def legend_below(figure: "Figure", axes: "Axes") -> None:
    """Put the legend of one panel below all of them, in as many columns as the figure is wide."""
    handles, labels = axes.get_legend_handles_labels()
    inches = 0.6 + 0.1 * max(map(len, labels), default=0)  # that the longest takes, with its line
    figure.legend(handles, labels, loc="outside lower center", ncols=max(1, int(figure.get_figwidth() / inches)))
