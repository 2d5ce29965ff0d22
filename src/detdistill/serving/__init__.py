"""A served teacher: ``detdistill teach`` answers over HTTP, and ``distill --served`` learns from it without the teacher."""
