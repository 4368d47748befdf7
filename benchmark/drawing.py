"""What all figures have in common: they read well in light and in dark."""

GREY = "#808080"  # reads well on white and on black


def new_figure(rows, columns, size):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"svg.hashsalt": "ppo", "font.size": 11, "text.color": GREY})
    plt.rcParams.update({"axes.edgecolor": GREY, "axes.labelcolor": GREY})
    plt.rcParams.update({"xtick.color": GREY, "ytick.color": GREY})
    options = {"figsize": size, "constrained_layout": True, "squeeze": False}
    figure, axes = plt.subplots(rows, columns, **options)
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def save(figure, path):
    figure.savefig(path, transparent=True, metadata={"Date": None})
    close(figure)


def close(figure):
    import matplotlib.pyplot as plt

    plt.close(figure)
