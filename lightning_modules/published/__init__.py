"""Published students of other projects: their files read, renamed and written as a folder of this project."""
