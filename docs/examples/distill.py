"""From nothing to a distilled student: circuits in both models, matched, trained, compared on fresh prompts."""

import workbench as wb

teacher, student = wb.Teacher.load("teacher"), wb.Student.load("student")
task = wb.task("entity_tracking")
pairs, training, test = (task.pairs(student, scenes=10, split=split) for split in ("calibration", "train", "test"))
search = {"method": "mean_ablation", "selection": "top", "heads": 16}
theirs, ours = wb.find_circuit(teacher, pairs, **search), wb.find_circuit(student, pairs, **search)
matching = wb.match(student, teacher, ours, theirs, pairs, rule="similarity", one_to_one=True)
plain = wb.distill(student, teacher, matching, training, weight=0, steps=40)
aligned = wb.distill(student, teacher, matching, training, weight=0.1, steps=40)
models = {"base": student, "circuit / CE": plain.student, "circuit / CE + CKA": aligned.student, "teacher": teacher}
table = wb.compare(models, test, circuits={"student": ours, "teacher": theirs}, matching=matching, random_circuits=2)
print(table)
