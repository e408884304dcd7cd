#include "../faults.hpp"

namespace dso {

// Nothing to repair: a file that is mapped cannot be truncated here. A read that the disk fails stays the system's exception
// (EXCEPTION_IN_PAGE_ERROR), since a view cannot be replaced by other memory under its owner.
void handle_faults(Repair) {}

}  // namespace dso
