"""From nothing to a distilled student: circuits in both models, matched, trained, compared on fresh prompts."""

import workbench as wb

teacher, student = wb.Teacher.load("teacher"), wb.Student.load("student")
task = wb.task("entity_tracking")
pairs = task.pairs(student, scenes=6)
theirs = wb.find_circuit(teacher, pairs, metric="logit_difference", heads=16)
ours = wb.find_circuit(student, pairs, metric="logit_difference", heads=16)
matching = wb.match(student, teacher, ours, theirs, pairs, rule="similarity", one_to_one=True)
training = task.pairs(student, scenes=10, split="train")
plain = wb.distill(student, teacher, matching, training, weight=0, steps=40)
aligned = wb.distill(student, teacher, matching, training, weight=0.3, steps=40)
models = {"base": student, "circuit / CE": plain.student, "circuit / CE + CKA": aligned.student, "teacher": teacher}
circuits = {"student": ours, "teacher": theirs}
table = wb.compare(models, task.pairs(student, scenes=20, split="test"), circuits=circuits, matching=matching)
print(table)
