"""Other libraries' models and files. Each module imports its library when it is used."""
