"""The operations of training, one a file: a native form for CPU tensors in bf16 and fp32, a plain torch form (`*_reference`)
for everything else, which is also what the native one is tested against."""
