"""Arguments and help of each command. Nothing here imports a slow module, so that --help is quick."""
