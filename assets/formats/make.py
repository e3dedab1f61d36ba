"""Write the examples of this folder that this program writes: `python assets/formats/make.py`.

`eap_graph.json` was written by EAP-IG's `Graph.to_json`, in the copy that circuitkit 0.2.0 carries (its `cfg` has two
keys more than the original's): a GPT-2 of 3 layers x 4 heads with random weights, 5 steps from the corrupt end, the 60
edges of highest score, pruned. The MIB submission holds the same graph, read and written here; the viewer's graph is
that of the bundled teacher's circuit by EAP-IG.
"""

from pathlib import Path

import workbench as wb
from workbench.circuits.edge_selection import EdgeSelection, Ranking
from workbench.circuits.formats import read_eap_graph, write_mib_submission
from workbench.circuits.viewer_graph import viewer_graph, write_viewer_graph
from workbench.patching.attribution import attribute_edges

HERE = Path(__file__).parent


def main() -> None:
    """Both."""
    write_mib_submission(HERE / "mib", {("ioi", "gpt2"): read_eap_graph(HERE / "eap_graph.json")})
    teacher = wb.Teacher.load("teacher")
    pairs = wb.task("entity_tracking", boxes=5).pairs(teacher, scenes=4)
    scores = attribute_edges(teacher, pairs, metric="logit_difference", steps=5)
    circuit = Ranking(scores, EdgeSelection(by="highest", greedy=True)).circuit(40, method="EAP-IG, 40 edges")
    write_viewer_graph(HERE / "viewer_graph.json", viewer_graph(circuit, teacher, pairs, slug="boxes", scan="teacher"))


if __name__ == "__main__":
    main()
