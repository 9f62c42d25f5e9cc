"""One module per stage; a stage is found by its name and defines run(config)."""
