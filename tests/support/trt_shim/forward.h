/* Forwarding of C entry points to a library that lies in the same folder. */
#ifndef FXQ_TRT_SHIM_FORWARD_H
#define FXQ_TRT_SHIM_FORWARD_H

#include <dlfcn.h>
#include <stddef.h>
#include <stdio.h>

/* The address of `symbol` in `library`, or NULL after saying why on stderr. The bare library name is found
   through the run path of the object that this is compiled into ($ORIGIN); opening it again is free. */
static void *forward(const char *library, const char *symbol) {
    void *handle = dlopen(library, RTLD_NOW | RTLD_LOCAL);
    void *address = handle ? dlsym(handle, symbol) : NULL;
    if (!address) fprintf(stderr, "%s: %s\n", library, dlerror());
    return address;
}

#endif
