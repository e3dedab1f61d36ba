"""What each family of tasks teaches: training sequences from easy to hard, their answers, and temporary probes."""
