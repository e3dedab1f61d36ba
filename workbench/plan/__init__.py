"""What a run costs before it is started: operations, memory and disk of every stage, from the recipe and the models'
configs alone."""
