"""Small tools beside training: the commands `convert` and `plan`, and what options of other tools are called here."""
