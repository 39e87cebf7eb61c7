/* libnvinfer.so.11 for the tensorrt bindings, over TensorRT-RTX's library.

   The C++ interfaces behind these pointers are the same; only the version that the bindings were compiled with
   differs, and the library refuses a version that is not its own. So each creator passes the library's own. */
#include "forward.h"
#include <stdint.h>

#define LIBRARY "libtensorrt_rtx.so.1"

typedef int32_t (*version_function)(void);
typedef void *(*create_function)(void *logger, int32_t version);
typedef void *(*create_refitter_function)(void *engine, void *logger, int32_t version);
typedef void *(*registry_function)(void);
typedef void *(*builder_registry_function)(int32_t capability);

static int32_t library_version(void) {
    version_function version = (version_function)forward(LIBRARY, "getInferLibVersion");
    return version ? version() : 0;
}

static void *create(const char *symbol, void *logger) {
    create_function function = (create_function)forward(LIBRARY, symbol);
    return function ? function(logger, library_version()) : NULL;
}

void *createInferBuilder_INTERNAL(void *logger, int32_t version) {
    (void)version;
    return create("createInferBuilder_INTERNAL", logger);
}

void *createInferRuntime_INTERNAL(void *logger, int32_t version) {
    (void)version;
    return create("createInferRuntime_INTERNAL", logger);
}

void *createInferRefitter_INTERNAL(void *engine, void *logger, int32_t version) {
    (void)version;
    create_refitter_function function =
        (create_refitter_function)forward(LIBRARY, "createInferRefitter_INTERNAL");
    return function ? function(engine, logger, library_version()) : NULL;
}

void *getPluginRegistry(void) {
    registry_function function = (registry_function)forward(LIBRARY, "getPluginRegistry");
    return function ? function() : NULL;
}

void *getBuilderPluginRegistry(int32_t capability) {
    builder_registry_function function =
        (builder_registry_function)forward(LIBRARY, "getBuilderPluginRegistry");
    return function ? function(capability) : NULL;
}
