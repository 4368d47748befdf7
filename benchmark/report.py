"""Fills the numbers, tables and links of the texts from the results, and draws the figures.

    python benchmark/report.py           # rewrites texts and figures that have changed
    python benchmark/report.py --check   # only says which are out of date

Between markers <!-- name arguments --> and <!-- end --> comes what FILLERS[name] returns, a
table or a number in a line. A link from a name to a script, [`Agent`](ppo.py#L1-L2), gets
the lines of that definition; [rollout], [advantages] and [update] those of these parts.
"""

import ast
import hashlib
import re
import shlex
import sys
from functools import cache

import figures
import findings
import tables
from results import RESULTS, ROOT

FILES = ["benchmark/claims.md", "benchmark/README.md", "README.md"]
NAMES = "results compared counts flags hyperparameters arms defaults tuned diagnostics "
NAMES += "speed rlhf probes"
FILLERS = {name: getattr(tables, name) for name in NAMES.split()}
NAMES = "effects ladder verdict verdicts effect kl_range scores mean_score mean_metric "
NAMES += "final speedup code rlhf_verdict"
FILLERS |= {name.replace("_", "-"): getattr(findings, name) for name in NAMES.split()}
PARTS = ["rollout", "advantages", "update"]  # of the training loop
MARKS = ["# 1. Rollout", "# 2. Advantages", "# 3. Update", "check_finite(agent"]


def markdown(table):
    """A DataFrame as a table."""
    cells = table.fillna("").astype(str).to_numpy().tolist()
    rows = [list(table.columns), ["---"] * table.shape[1], *cells]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) if cells else "No runs yet."


def fill(found):
    name, *arguments = shlex.split(found[2])
    content = FILLERS[name](*arguments)
    content = content if isinstance(content, str) else f"\n{markdown(content)}\n"
    return f"{found[1]}{content}<!-- end -->"


@cache
def places(script):
    """{name: (first line, last line)} of all definitions, and of the parts of train."""
    source = (ROOT / script).read_text()
    nodes = [node for node in ast.walk(ast.parse(source)) if hasattr(node, "name")]
    found = {node.name: (node.lineno, node.end_lineno) for node in reversed(nodes)}
    starts = [source[: source.index(mark)].count("\n") + 1 for mark in MARKS]
    return found | {name: (x, y - 1) for name, x, y in zip(PARTS, starts, starts[1:])}


def link(found):
    first, last = places(found[4])[found[2]]
    return f"[{found[1]}{found[2]}{found[3]}]({found[4]}#L{first}-L{last})"


def render(text):
    marked = r"(<!-- (?!end)([^\n]+?) -->)(?:(?!<!-- ).)*<!-- end -->"
    text = re.sub(marked, fill, text, flags=re.S)
    return re.sub(r"\[(`?)(\w+)(`?)\]\((ppo\w*\.py)(?:#[L\d-]+)?\)", link, text)


def fingerprint(figure):
    """A hash of what is drawn, kept in the picture: so --check need not draw it."""
    drawn = []
    for axis in figure.axes:
        texts = [text.get_text() for text in axis.texts]
        drawn += [axis.get_title(), axis.get_xlabel(), axis.get_ylabel(), texts]
        for line in axis.lines:
            points = [f"{x:.5g}" for x in line.get_xydata().flatten()]
            drawn += [line.get_label(), line.get_color(), line.get_linewidth(), points]
    return hashlib.sha256(repr(drawn).encode()).hexdigest()[:16]


def main():
    check, stale = "--check" in sys.argv, []
    for file in FILES:
        path = ROOT / file
        old = path.read_text()
        if (text := render(old)) != old:
            stale.append(file)
            if not check:
                path.write_text(text)
    for name, draw in figures.FIGURES.items():
        path, figure = RESULTS / f"{name}.svg", draw()
        mark = f"data {fingerprint(figure)}"
        if not path.exists() or mark not in path.read_text():
            stale.append(path.name)
            if not check:
                metadata = {"Date": None, "Description": mark}
                figure.savefig(path, transparent=True, metadata=metadata)
        figures.plt.close(figure)
    if check and stale:
        sys.exit(f"Out of date: {', '.join(stale)}. Run: python benchmark/report.py")


if __name__ == "__main__":
    main()
