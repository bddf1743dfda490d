// A libcuda.so.1 for cuda-bindings to load where there is no GPU: graphs that a launch runs, with WHILE nodes. The
// structures are laid out as the driver's ABI has them, so what reaches here is what the driver would get.
// Two kernels: `count_down` (left, handle), and any other name, which adds 1 to the int64 that its argument points to.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { SUCCESS = 0, INVALID_VALUE = 1, KERNEL = 0, GRAPH = 4, CONDITIONAL = 13, WHILE = 1, MOST = 64 };

typedef struct Graph Graph;
typedef struct {
    int kind, count_down;
    void *argument;      // a kernel's first
    uint64_t handle;     // a kernel's second, a conditional's
    Graph *graph;        // a child's, a body
} Node;
struct Graph {
    Node nodes[MOST];
    size_t number;
};

typedef struct {  // CUDA_KERNEL_NODE_PARAMS_v2
    void *func;
    unsigned grid[3], block[3], shared;
    void **params, **extra;
    void *kern, *ctx;
} KernelParams;
typedef struct {  // CUgraphNodeParams, of a conditional node
    int type, reserved0[3];
    uint64_t handle;
    int conditional_type;
    unsigned size;
    Graph **bodies;
    void *ctx;
    char rest[232 - 32];
    long long reserved2;
} NodeParams;
_Static_assert(sizeof(NodeParams) == 256, "CUgraphNodeParams");

static int context, conditions[MOST], created[MOST];
static uint64_t handles = 0;
int64_t fake_alive = 0, fake_launches = 0;

int cuInit(unsigned flags) { return SUCCESS; }
int cuGetProcAddress_v2(const char *name, void **made, int version, uint64_t flags, int *found) {
    static const char *newest[] = {"%s_v2", "%sWithFlags", "%s"};  // of what is here; cuda-bindings asks by the first name
    void *here = dlopen("libcuda.so.1", RTLD_NOW | RTLD_NOLOAD);
    char full[200];
    *made = NULL;
    for (int i = 0; i < 3 && !*made; i++) {
        snprintf(full, sizeof full, newest[i], name);
        *made = dlsym(here, full);
    }
    if (found) *found = *made ? 0 : 1;
    return *made ? SUCCESS : INVALID_VALUE;
}
int cuCtxGetCurrent(void **made) { *made = &context; return SUCCESS; }
int cuModuleLoadData(void **made, const char *image) {
    if (!strstr(image, ".entry count_down")) return INVALID_VALUE;
    *made = strdup(image);
    return SUCCESS;
}
int cuModuleGetFunction(void **made, void *module, const char *name) {
    *made = strdup(name);
    return SUCCESS;
}
int cuGraphCreate(Graph **made, unsigned flags) {
    *made = calloc(1, sizeof(Graph));
    fake_alive++;
    return flags ? INVALID_VALUE : SUCCESS;
}
int cuGraphConditionalHandleCreate(uint64_t *made, Graph *graph, void *ctx, unsigned value, unsigned flags) {
    if (ctx != &context || flags != 1) return INVALID_VALUE;
    *made = ++handles;
    created[*made] = value;
    return SUCCESS;
}
static Node *added(Graph *graph, int kind, Node **out) {
    Node *node = &graph->nodes[graph->number++];
    node->kind = kind;
    return *out = node;
}
int cuGraphAddNode_v2(Node **made, Graph *graph, Node **of, void *data, size_t number, NodeParams *params) {
    if (number || params->type != CONDITIONAL || params->conditional_type != WHILE || params->size != 1) return INVALID_VALUE;
    for (size_t i = 0; i < sizeof params->rest; i++)
        if (params->rest[i]) return INVALID_VALUE;
    if (params->ctx != &context || params->handle != handles) return INVALID_VALUE;
    Node *node = added(graph, CONDITIONAL, made);
    node->handle = params->handle;
    node->graph = calloc(1, sizeof(Graph));
    params->bodies = &node->graph;
    return SUCCESS;
}
int cuGraphAddChildGraphNode(Node **made, Graph *graph, Node **of, size_t number, Graph *child) {
    if (number) return INVALID_VALUE;
    Node *node = added(graph, GRAPH, made);
    node->graph = malloc(sizeof(Graph));
    memcpy(node->graph, child, sizeof(Graph));  // a copy, as the driver's
    return SUCCESS;
}
int cuGraphAddKernelNode_v2(Node **made, Graph *graph, Node **of, size_t number, KernelParams *params) {
    for (int i = 0; i < 3; i++)
        if (params->grid[i] != 1 || params->block[i] != 1) return INVALID_VALUE;
    int count_down = !strcmp(params->func, "count_down");
    if (params->shared || params->extra || (count_down && (number != 1 || of[0] != &graph->nodes[0]))) return INVALID_VALUE;
    Node *node = added(graph, KERNEL, made);
    node->count_down = count_down;
    node->argument = *(void **)params->params[0];
    if (count_down) node->handle = *(uint64_t *)params->params[1];
    return SUCCESS;
}
int cuGraphGetNodes(Graph *graph, Node **nodes, size_t *number) {
    for (size_t i = 0; nodes && i < *number && i < graph->number; i++) nodes[i] = &graph->nodes[i];
    *number = graph->number;
    return SUCCESS;
}
int cuGraphNodeGetType(Node *node, int *kind) { *kind = node->kind; return SUCCESS; }
int cuGraphChildGraphNodeGetGraph(Node *node, Graph **child) { *child = node->graph; return SUCCESS; }
int cuGraphInstantiateWithFlags(Graph **made, Graph *graph, unsigned long long flags) {
    *made = graph;
    fake_alive++;
    return flags ? INVALID_VALUE : SUCCESS;
}
static void run(Graph *graph) {
    for (size_t i = 0; i < graph->number; i++) {
        Node *node = &graph->nodes[i];
        if (node->kind == GRAPH) run(node->graph);
        else if (node->kind == CONDITIONAL) while (conditions[node->handle]) run(node->graph);
        else if (node->count_down) conditions[node->handle] = --*(int32_t *)node->argument > 0;
        else ++*(int64_t *)node->argument;
    }
}
int cuGraphLaunch(Graph *graph, void *stream) {
    if (stream != (void *)7) return INVALID_VALUE;
    fake_launches++;
    memcpy(conditions, created, sizeof conditions);
    run(graph);
    return SUCCESS;
}
int cuGraphExecDestroy(Graph *graph) { fake_alive--; return SUCCESS; }
int cuGraphDestroy(Graph *graph) { fake_alive--; return SUCCESS; }
