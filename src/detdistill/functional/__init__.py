"""Pure functions that several rooms share: boxes, matching, masks, attention. Losses of methods are in ``detdistill.losses``."""
