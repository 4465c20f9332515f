if __name__ != "sparsec.passes":  # one identity per class: see CONTRIBUTING, "layout"
    raise ImportError("import sparsec.passes, not passes")
