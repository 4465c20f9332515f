if __name__ != "sparsec.codegen":  # one identity per class: see CONTRIBUTING, "layout"
    raise ImportError("import sparsec.codegen, not codegen")
