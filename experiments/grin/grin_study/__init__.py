"""The study of GRIN's router: its arms, their runs, how these are compared, tables and pictures."""
