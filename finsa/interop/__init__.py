"""Files of other trainers, translated: every key is accounted for."""
