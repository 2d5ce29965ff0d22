"""Caches of teacher knowledge on disk: ``detdistill cache`` writes them, ``distill --cache`` reads them without the teacher."""
