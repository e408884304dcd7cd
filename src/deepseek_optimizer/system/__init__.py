"""What the machine has and allows. Every function reads the system's files below a root, so that tests can bring their own."""
