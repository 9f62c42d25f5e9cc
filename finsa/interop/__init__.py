"""Translation of files of other trainers; every key has an outcome."""
