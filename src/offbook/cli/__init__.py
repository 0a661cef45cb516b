"""The command line. `main` holds the table of verbs; each verb is a plain function in the module of its group."""
