"""Look into students: which layers are alike, what each contributes, which target dimensions are learnt."""
