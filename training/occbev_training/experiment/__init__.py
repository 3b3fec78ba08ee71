"""Does pre-training pay? A registered experiment on simulated streets, from pictures to a tested answer."""
