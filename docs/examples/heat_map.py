"""From nothing to a heat map: which attention heads of a model do a task?"""

import workbench as wb

teacher = wb.Teacher.load("teacher")
pairs = wb.task("entity_tracking").pairs(teacher, scenes=6)
search = wb.find_circuit(teacher, pairs, metric="logit_difference")
figure = wb.plots.heads(search)
figure.write_html("heat_map.html")
