"""Models and files of other libraries; each module imports its library when it is used."""
