"""What every command needs and no paper mentions: errors, files, checkpoints, processes, optimizers, monitor.
Imports nothing of ours from outside this folder."""
