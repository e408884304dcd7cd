"""Work on untrusted input in processes of its own, with limits of time and memory."""
