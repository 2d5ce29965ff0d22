"""Released code of the methods beside ours: where it lies, how it is loaded alone, and what is compared."""
