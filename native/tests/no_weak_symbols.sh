#!/bin/sh
# no_weak_symbols.sh NM OBJECT...: fails where an object defines a weak symbol (an inline function or a template that the
# linker may keep for every ISA), or any global one but its tables.
nm=$1
shift
bad=$(for object in "$@"; do "$nm" -C --defined-only "$object" | grep -E ' [WVuTDBR] ' | grep -v -E ' [DR] dso::\w+::((linear|attention|latent|row)_kernels|train_(product|elementwise|attention))$' | sed "s|^|$(basename "$object"): |"; done)
[ -z "$bad" ] && exit 0
echo "$bad"
exit 1
