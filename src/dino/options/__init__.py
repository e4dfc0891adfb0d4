"""Everything that a user can set, at the bottom of the house: nothing heavy is imported here."""
