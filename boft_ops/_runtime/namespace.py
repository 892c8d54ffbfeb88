"""The operator namespace of this copy of the package, derived from the name it is imported under.

    boft_ops                          ->  torch.ops.boft_ops
    mytrainer.third_party.boft_ops    ->  torch.ops.mytrainer__third_party__boft_ops

An installed package and any number of vendored copies can therefore share one process, because no
copy registers its operators over those of another.
"""

import re

PACKAGE = __name__.rsplit(".", 2)[0]  # without _runtime.namespace
NS = re.sub(r"\W", "_", PACKAGE.replace(".", "__"))
