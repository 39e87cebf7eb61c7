/* libnvonnxparser.so.11 for the tensorrt bindings, over TensorRT-RTX's ONNX parser. See nvinfer.c. */
#include "forward.h"
#include <stdint.h>

#define LIBRARY "libtensorrt_onnxparser_rtx.so.1"

typedef int (*version_function)(void);
typedef void *(*create_function)(void *network_or_refitter, void *logger, int version);

int getNvOnnxParserVersion(void) {
    version_function version = (version_function)forward(LIBRARY, "getNvOnnxParserVersion");
    return version ? version() : 0;
}

static void *create(const char *symbol, void *network_or_refitter, void *logger) {
    create_function function = (create_function)forward(LIBRARY, symbol);
    return function ? function(network_or_refitter, logger, getNvOnnxParserVersion()) : NULL;
}

void *createNvOnnxParser_INTERNAL(void *network, void *logger, int version) {
    (void)version;
    return create("createNvOnnxParser_INTERNAL", network, logger);
}

void *createNvOnnxParserRefitter_INTERNAL(void *refitter, void *logger, int32_t version) {
    (void)version;
    return create("createNvOnnxParserRefitter_INTERNAL", refitter, logger);
}
