"""Resources and limits of the machine. Functions read system files below a root directory, which tests can replace."""
