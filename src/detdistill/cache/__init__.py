"""What teachers said, on disk: ``detdistill cache`` writes it, ``distill --cache`` reads it back instead of running them."""
