if __name__ != "sparsec.targets":  # one identity per class: see CONTRIBUTING, "layout"
    raise ImportError("import sparsec.targets, not targets")
