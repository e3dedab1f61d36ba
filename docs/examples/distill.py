"""From nothing to a distilled student: circuits in both models, matched, trained, compared on fresh prompts."""

import workbench as wb

teacher, student = wb.Teacher.load("teacher"), wb.Student.load("student")
task = wb.task("entity_tracking")
pairs, training, test = (task.pairs(student, scenes=8, split=split) for split in ("calibration", "train", "test"))
theirs = wb.find_circuit(teacher, pairs, method="mean_ablation", heads=16)
ours = wb.find_circuit(student, pairs, method="mean_ablation", heads=16)
matching = wb.match(student, teacher, ours, theirs, pairs, rule="similarity", one_to_one=True)
plain = wb.distill(student, teacher, matching, training, weight=0, steps=40)
aligned = wb.distill(student, teacher, matching, training, weight=0.3, steps=40)
models = {"base": student, "circuit / CE": plain.student, "circuit / CE + CKA": aligned.student, "teacher": teacher}
table = wb.compare(models, test, circuits={"student": ours, "teacher": theirs}, matching=matching)
print(table)
